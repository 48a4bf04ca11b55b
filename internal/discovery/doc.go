// Package discovery finds how the proxy of a domain is reached: at which
// addresses and ports, by which transport, and which name its certificate has
// to prove.
//
// # Steps
//
// A server name is an address or the name of a host, perhaps with a port
// ([ParseInput]). An address, a name with a port, a name in the host's own
// table and a local name are used as they are. Any other name is a domain,
// whose owner has these ways to say where its proxy is, in this order:
//
//   - a delegation file, https://DOMAIN/.well-known/masquevpn/server, with
//     another server name, which is then resolved in place of the domain
//   - SRV records (RFC 2782) of _masque._udp for HTTP/3 and _masque._tcp for
//     HTTP/2, which are one list; peers ask for _masque-fed first
//   - HTTPS records (RFC 9460), with another port or an alias
//   - the addresses of the domain, with port 443
//
// The step that decided is part of the [Result], which has the records to try
// in groups: a group is tried when all records of the groups before it failed.
//
// # Names that servers prove
//
// Whoever delegates by something that nobody can forge, the delegation file by
// its TLS or an SRV record by its signature, also delegates the name on the
// certificate. Whoever delegates by plain DNS does not: the server that an
// unsigned record names has to prove the name of the domain.
//
// # Failures
//
// Records that exist and cannot be used are an error, so that their owner sees
// the mistake. A failure of DNS is not taken for the absence of records: former
// records serve, then, for clients without DNSSEC, the addresses of the domain.
// A delegation file that is missing or not valid is none; a former answer
// serves while the web server fails.
//
// A [Resolver] has no socket and no clock: the caller gives it DNS, Fetch and
// Now. It remembers delegation files and SRV records, so a program has one.
package discovery
