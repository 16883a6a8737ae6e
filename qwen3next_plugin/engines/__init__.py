"""One folder per host engine; the only code that imports one."""
