"""One module per suite, each with `cases(quick)`."""
