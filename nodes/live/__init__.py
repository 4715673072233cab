"""The live picture on the nodes: what a graph's next run will guide, and what the last one did."""
