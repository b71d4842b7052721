"""The command `congrad`: arguments in, tables on the screen out."""
