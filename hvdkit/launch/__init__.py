"""Starting jobs: `python -m hvdkit.launch -np N -- command` runs a command on N ranks under `horovodrun`."""
