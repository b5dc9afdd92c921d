"""The two families of graphs that a bundle can hold, and what the steps have to know of each.

Owns: the families' names and, for each, which graphs are large. Must not import anything of this
package: bundle, capture and quantisation all read it.
"""

from __future__ import annotations

REFERENCE = "reference"
DEPLOYED = "deployed"
FAMILIES = (REFERENCE, DEPLOYED)

# Where weights and time go: the graphs that can be INT8 and whose inputs are captured, in the
# order in which they run. The first makes features, the second actions.
LARGE_GRAPHS = {
    REFERENCE: ("backbone", "dit"),
    DEPLOYED: ("backbone", "action_head"),
}

# Runs on the CPU, once for each new instruction; it never becomes an engine.
PREFIX_GRAPH = "prefix"
