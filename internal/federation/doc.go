// Package federation has the rules by which servers of two domains recognise
// each other: the request fields of a pair of domains, and the identity that a
// certificate proves.
//
// A server proves a domain in one of these ways, the first that applies:
//
//   - its certificate is for the domain, and leads to an authority that the
//     operator trusts ([Certificate])
//   - its key was exchanged beforehand ([Pin])
//   - its certificate is for the server that the domain's delegation file names
//     ([WellKnown])
//   - its certificate is for the target of a signed SRV record of the domain
//     ([DNSSEC])
//
// Control of the domain's DNS alone proves nothing.
//
// An acceptor has to look up and fetch what its peer's certificate does not
// prove, so [Peer.Direct], which asks for nothing, comes before [Verifier.Ask].
// Who dials has asked already, and uses [Peer.ByResult].
package federation
