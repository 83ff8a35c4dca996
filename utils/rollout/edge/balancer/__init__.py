"""The load balancer in front of the two models: HAProxy, written for 2.6, Debian 12's.

haproxy_configuration   what serves where, as the text of haproxy.cfg
haproxy          its process, its admin socket, what it is told while it runs
old_workers      answers that still stream in workers which a reload replaced, and those that were cut
near_sockets     Unix sockets beside the configuration, however long the path to it is
"""
