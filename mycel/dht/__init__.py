"""What everyone can look up: keys, signed expiring records, the store and the directory."""
