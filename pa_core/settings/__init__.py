"""The settings: found, read, validated as a whole, and turned into plugins."""
