"""What is found out before the first update: errors that would end the run later, and what the run will take."""
