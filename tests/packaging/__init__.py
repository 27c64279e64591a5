"""What is distributed: it builds, installs and works where nothing of this repository is."""
