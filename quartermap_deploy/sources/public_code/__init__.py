"""Public model code made to import, run and export here: packages stood in for, scans redirected."""
