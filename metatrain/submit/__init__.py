"""Runs on a cluster by one command: checked here, then handed to Ray's job server, or written as a manifest.

The only importer of Ray's job submission client.
"""
