"""What the tables and figures of every experiment share; what each shows stands beside it."""
