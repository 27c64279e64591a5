"""What the long-running commands share: options, processes, memory, files, pictures, errors."""
