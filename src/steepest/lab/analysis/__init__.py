"""Records as tables, and what follows from them: the ranking, its tests, and what was not fair."""
