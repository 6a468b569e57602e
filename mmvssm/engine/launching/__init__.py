"""Start a tool: its process, the others, the machine."""
