"""The command line `nvlm`: one module a subcommand."""
