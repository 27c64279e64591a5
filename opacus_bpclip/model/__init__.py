"""A model as the method sees it: its layers, their calls, and what nobody bounds."""
