// Package connectip implements one CONNECT-IP request stream (RFC 9484), from
// the response until the stream ends. Client and proxy share it: they differ in
// the capsules that they send and in their [Handler]. The package also parses
// URI templates, counts packets and describes tunnels for status output,
// because both roles need the same.
//
// # Serving a stream
//
// The client sends the request whose URI [Template.Expand] returns; the proxy
// parses it with [Template.Match] into a [Scope]. Once the response is sent or
// received, both pass the stream to [New] and call [Conn.Run], which returns
// when the stream ends. [Explain] turns its error into text for users, and
// [ErrorCode] into the code for the peer.
//
//	conn := connectip.New(str, quicConn, connectip.Config{
//		Device:  device,
//		Handler: connectip.Handler{Assigned: assigned, Routes: routes},
//		Stats:   new(connectip.Stats),
//	})
//	err := conn.Run(ctx)
//
// # Capsules
//
// [Conn.Request] requests addresses. [Conn.Assign], [Conn.Advertise],
// [Conn.AssignDNS] and [Conn.SendPREF64] each send a complete list, which
// replaces the previous list of the same kind. Handler receives the peer's
// capsules, and [Filter] limits their effect. A Conn handles 10 capsules per
// second with bursts of 50, because each may change the policy and the kernel.
//
// # Policy
//
// Four lists determine which packets pass: the addresses assigned to each
// endpoint and the routes advertised by each. A packet's source must be
// assigned to or advertised by its sender, and its destination must be assigned
// to or advertised by its receiver (RFC 9484 section 4.8). Each endpoint checks
// both directions. Every change computes a new immutable policy behind an
// atomic pointer, so packets take no lock.
//
// Where a router would send an ICMP error, the Conn sends one, within a rate
// limit: through the device if the packet came from the host, and through the
// tunnel if it came from the peer.
//
// # Owners of buffers
//
// No step retains a buffer that it does not own.
//
// Packets to the peer: the caller of [Conn.Send] owns buf. During the call the
// Conn decrements the hop limit, clamps the MSS and writes the prefix of the
// datagram into the bytes before the packet, all in place. QUIC copies the
// result into a buffer of its own before Send returns, so the caller may then
// reuse buf. A packet that exceeds the MTU is fragmented in a buffer that
// belongs to Send.
//
// Packets from the peer: QUIC, or the capsule reader, owns the datagram and
// lends it to the Conn for one call, which may modify it. The inbox copies an
// admitted packet into a batch that it took from the shared pool. The batch
// belongs to the goroutine that fills it, then to the goroutine that writes it
// to the device. Device.Write may overwrite the batch but does not retain it,
// and the writer returns it to the pool. If there is no batch in time, the
// packet is copied into a buffer that belongs to a single call of
// Device.Write.
//
// ICMP errors and echo replies have a buffer of their own. It belongs to the
// answer queue until the goroutine that sends answers takes it out.
package connectip
