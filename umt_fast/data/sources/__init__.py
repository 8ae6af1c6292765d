"""Lists of what is trained on, and their checks. Nothing here decodes a picture."""
