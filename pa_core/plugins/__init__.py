"""The plugin manager: which plugins exist, what they implement, and how the loop calls them."""
