"""What every package may use: files, signals, plugins, secrets, fault injection."""
