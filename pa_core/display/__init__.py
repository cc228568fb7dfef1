"""What people see of a run: tables, plots and data frames of what it has recorded."""
