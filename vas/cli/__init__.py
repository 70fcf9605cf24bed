"""The `vas` command, thin over the library."""
