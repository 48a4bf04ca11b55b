package discovery

import (
	"fmt"
	"net/netip"
)

// A Code is the kind of an Error. It is part of the output of programs.
type Code string

// The codes.
const (
	InvalidName      Code = "invalid_name"      // the input is no server name
	NoAddresses      Code = "no_addresses"      // the name exists without addresses, or not at all
	DNSFailure       Code = "dns_failure"       // temporary
	AliasLoop        Code = "alias_loop"        // circular aliases, or more than 8
	NotOffered       Code = "not_offered"       // the domain declares that there is no service
	OtherTransport   Code = "other_transport"   // records for unsupported transports alone
	UnusableRecords  Code = "unusable_records"  // SRV records, all of them skipped
	ForbiddenAddress Code = "forbidden_address" // addresses at which no server can be
	NotSecure        Code = "not_secure"        // unsigned answers with DNSSEC Require
)

// An Error is the reason why a resolution found nothing.
type Error struct {
	Code        Code
	Reason      string
	Remedy      string    // in the imperative
	WellKnown   string    // as in Result
	Skipped     []Skipped // as in Result
	Delegated   Name      // as in Result
	FileUnknown bool      // as in Result
}

// Error returns the reason and the remedy.
func (e *Error) Error() string { return e.Reason + ": " + e.Remedy }

const tellOperator = "tell its operator"

func noAddresses(name string) *Error {
	return &Error{Code: NoAddresses, Reason: fmt.Sprintf("the name %s has no address", name),
		Remedy: "check its spelling in the configuration, and this host's DNS"}
}

func dnsFailure(name string, cause error) *Error {
	return &Error{Code: DNSFailure,
		Reason: fmt.Sprintf("DNS does not answer about %s (%v)", name, cause),
		Remedy: "check this host's DNS"}
}

func aliasLoop(name string) *Error {
	return &Error{Code: AliasLoop, Reason: fmt.Sprintf("the aliases of %s lead in circles", name),
		Remedy: tellOperator}
}

func notOffered(name string) *Error {
	return &Error{Code: NotOffered,
		Reason: fmt.Sprintf("%s says in its DNS that it has no MASQUE proxy", name),
		Remedy: "check the name, or ask its operator"}
}

func otherTransport(name, service string, t Transport) *Error {
	return &Error{Code: OtherTransport,
		Reason: fmt.Sprintf("%s offers its proxy by %s (_%s.%s) alone, which this program does not speak",
			name, t.protocol(), service, t.label()),
		Remedy: fmt.Sprintf("ask its operator for _%s.%s", service, t.other().label())}
}

func unusableRecords(name string, skipped []Skipped) *Error {
	first := skipped[0]
	return &Error{Code: UnusableRecords, Reason: fmt.Sprintf(
		"no SRV record of %s can be used (%s port %d: %s)", name, first.target, first.port,
		first.Reason.describe()), Remedy: tellOperator + ", or write the proxy with its port"}
}

func forbiddenAddress(name string, a netip.Addr) *Error {
	return &Error{Code: ForbiddenAddress,
		Reason: fmt.Sprintf("%s leads to %s, where no proxy of another host can be", name, a),
		Remedy: tellOperator}
}

func notSecure(name string) *Error {
	return &Error{Code: NotSecure,
		Reason: fmt.Sprintf("the DNS answers about %s are not signed, or this host's resolver does not say so",
			name),
		Remedy: `use a validating resolver, or set discovery.dnssec to "off"`}
}
