"""What runs a plan. Backends agree with one another and never import one another."""
