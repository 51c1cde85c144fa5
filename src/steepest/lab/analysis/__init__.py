"""What the records say: tables, rankings and tests."""
