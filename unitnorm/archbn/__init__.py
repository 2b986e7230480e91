"""ArchBN, the paper's network, and its training: what Table 2, studies, symmetry and bench use."""
