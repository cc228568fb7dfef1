"""Settings: the table ``[tool.pa-core]``, its validation and schema, and the plugins it enables."""
