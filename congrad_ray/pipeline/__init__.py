"""The order of the stages, and doing one: is it done, does it fit, do it, commit it."""
