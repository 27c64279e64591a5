"""What stands in the place of a layer and bounds its gradient."""
