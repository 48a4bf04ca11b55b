package capsule_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/netip"

	"masquevpn/capsule"
)

// A client reads the capsules that the proxy sends after its response.
func ExampleReader() {
	var stream bytes.Buffer
	stream.Write((&capsule.AddressAssign{Addresses: []capsule.Address{
		{RequestID: 1, Prefix: netip.MustParsePrefix("192.0.2.7/32")},
		{RequestID: 2, Prefix: netip.MustParsePrefix("::/128")},
	}}).Append(nil))
	stream.Write((&capsule.RouteAdvertisement{Routes: capsule.Routes(
		[]netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, 0,
	)}).Append(nil))

	r := capsule.NewReader(&stream, 64<<10)
	for {
		c, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			fmt.Println(err)
			return
		}
		switch c := c.(type) {
		case *capsule.AddressAssign:
			for _, a := range c.Addresses {
				if a.Refused() {
					fmt.Println("request", a.RequestID, "was refused")
				} else {
					fmt.Println("address", a.Prefix)
				}
			}
		case *capsule.RouteAdvertisement:
			for _, route := range c.Routes {
				fmt.Println("route", route.Start, "to", route.End)
			}
		}
	}
	// Output:
	// address 192.0.2.7/32
	// request 2 was refused
	// route 10.0.0.0 to 10.255.255.255
}

// A receiver distinguishes a malformed capsule from a broken connection, and
// logs the field that is wrong.
func ExampleError() {
	// An IPv4 prefix cannot have 33 bits.
	stream := bytes.NewReader([]byte{1, 7, 0, 4, 192, 0, 2, 0, 33})
	_, err := capsule.NewReader(stream, 64<<10).Next()
	if errors.Is(err, capsule.ErrMalformed) {
		fmt.Println("reset the stream with H3_MESSAGE_ERROR")
	}
	if e, ok := errors.AsType[*capsule.Error](err); ok {
		fmt.Println("entry:", e.Entry)
		fmt.Println("field:", e.Field)
		fmt.Println("reason:", e.Reason)
	}
	// Output:
	// reset the stream with H3_MESSAGE_ERROR
	// entry: 0
	// field: IP Prefix Length
	// reason: 33 is more than 32
}

// A client asks for one address of each IP version, with no preference. It
// checks the capsule before it is written to the stream.
func ExampleAddressRequest() {
	request := &capsule.AddressRequest{Addresses: []capsule.Address{
		{RequestID: 1, Prefix: netip.MustParsePrefix("0.0.0.0/32")},
		{RequestID: 2, Prefix: netip.MustParsePrefix("::/128")},
	}}
	if err := request.Validate(); err != nil {
		fmt.Println(err)
		return
	}
	fmt.Printf("%x\n", request.Append(nil))
	// Output:
	// 021a0104000000002002060000000000000000000000000000000080
}

// A proxy with overlapping prefixes in its configuration advertises each
// address once.
func ExampleRoutes() {
	routes := capsule.Routes([]netip.Prefix{
		netip.MustParsePrefix("2001:db8::/32"),
		netip.MustParsePrefix("192.0.2.128/25"),
		netip.MustParsePrefix("192.0.2.0/24"),
	}, 0)
	for _, r := range routes {
		fmt.Println(r.Start, r.End)
	}
	// Output:
	// 192.0.2.0 192.0.2.255
	// 2001:db8:: 2001:db8:ffff:ffff:ffff:ffff:ffff:ffff
}
