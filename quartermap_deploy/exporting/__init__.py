"""The export: a model is traced by the frontend, goes through the passes, and gets its precision and its bodies.

trace → passes → ranges → cast_precision → lower
"""
