"""HTTP on one side, values on the other. The only room that knows the web framework."""
