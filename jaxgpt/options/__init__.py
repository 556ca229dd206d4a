"""Every option, and reading them from TOML and the command line."""
