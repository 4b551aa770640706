"""The command ``mp``. One file for each command: it parses, calls the store or the merge engine, and renders."""
