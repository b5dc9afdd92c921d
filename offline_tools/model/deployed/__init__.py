"""GR00T N1.6 as the robot runs it: everything that never changes is computed once, exactly."""
