"""The built-in plugins, one per file; `pa_core.plugins.builtin_names` lists them."""
