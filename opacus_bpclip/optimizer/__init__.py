"""The private optimizer: noise, division, step, and what it stores."""
