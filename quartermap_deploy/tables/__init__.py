"""Results as tables and in words, which the command line, the report and the project's evidence show alike."""
