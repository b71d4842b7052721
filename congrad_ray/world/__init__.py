"""A tiny multilingual world: prompts with checkable best answers, a chat model and the true quality.

Everything that the whole loop needs is built in, so that it runs end to end on two CPU cores without a
download and its outcome can be measured against the true quality of every response.
"""
