"""What changes the weights: solvers, schedules and averages."""
