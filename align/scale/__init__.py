"""`align scale`: quality against compute at inference."""
