// Package capsule encodes, decodes and validates the capsules of CONNECT-IP
// (RFC 9484 section 4.7, draft-ietf-masque-connect-ip-dns-06) and the DATAGRAM
// capsule (RFC 9297 section 3.5). It knows nothing of HTTP or QUIC: it reads
// from an [io.Reader] and appends to byte slices.
//
// # Receiving
//
// [NewReader] takes the stream of a CONNECT-IP request after its headers, and
// the length of the longest capsule value to accept. [Reader.Next] returns one
// capsule after another, for a type switch over the implementations of
// [Capsule]. It skips capsules of unknown types, as RFC 9297 section 3.2
// requires, and needs no more memory for a long one than for a short one.
//
// Next returns only valid capsules. The error tells how to end the stream:
//
//   - [io.EOF]: the peer ended the stream between two capsules.
//   - [ErrMalformed]: the peer violated an RFC. Reset the stream with
//     H3_MESSAGE_ERROR. The error is usually an *[Error], which names the
//     capsule, the entry and the field for the log.
//   - [ErrTooLarge]: the capsule exceeds the limit given to NewReader.
//   - Any other error comes from the underlying reader.
//
// # Sending
//
// Fill in a capsule, call Validate, and append it to the bytes for the stream.
// Validate applies the rules that the peer's receiver will apply. [Routes]
// turns prefixes in any order into the sorted, disjoint ranges that a
// [RouteAdvertisement] requires.
//
// # The caller's part
//
// An ADDRESS_ASSIGN, ROUTE_ADVERTISEMENT, DNS_ASSIGN or PREF64 capsule carries
// a full list that replaces the list of the previous capsule of its type.
// Applying it is the caller's task, as are all rules that need the history of a
// session: an [AddressRequest] must not reuse the request IDs of earlier
// requests, each requested address needs an answer, and a refusal
// ([Address.Refused]) must not be taken for an address.
//
// A [Datagram] is valid until the next call of Next. Copy the payload to keep
// it.
package capsule
