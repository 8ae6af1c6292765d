"""`demo`: a page on this machine that searches clips by a text or by a clip and plays what it finds."""
