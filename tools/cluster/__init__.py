"""Work of commands on the machines of a cluster, through Ray."""
