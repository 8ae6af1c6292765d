"""The larger commands of `python -m umt_fast`, a file each: a function whose arguments are the options."""
