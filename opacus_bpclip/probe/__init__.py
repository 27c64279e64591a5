"""Try a model out before it meets data: do its examples keep apart, and how often is each layer used?"""

