"""A function mapped over layers: in this process, in several, or on a Dask cluster."""
