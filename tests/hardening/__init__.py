"""What lewis_hub promises about hostile files, disks, networks and neighbours; docs/reliability.md.

The gate runs a short form. With LEWIS_HUB_LONG=N the tests of this folder do N times as much, from
other seeds if LEWIS_HUB_SEED is set, as the job `hardening` of check.yml does at night.
"""
