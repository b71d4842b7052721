"""One module per stage; here alone Ray Data and Ray Train meet the core. A stage reads tables and writes one."""
