"""What the long-running commands share: processes, peak memory, files, errors."""
